"""What may be changed in a model, the one door that changes it, and the result as data."""
