"""The cheap repair of a pruned model: one pass in which its layers make up for the edit."""
