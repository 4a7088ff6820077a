"""Inside a trained model: what its matrices, heads, losses and bits are like."""
