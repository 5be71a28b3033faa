"""What a model costs: counted, or measured in turn with another."""
