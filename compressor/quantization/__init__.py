"""What eight bits must cover: the ranges of a model's values, observed on data."""
