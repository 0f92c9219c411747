"""Linear algebra of the optimizers: products, roots and orthogonal factors of stacked matrices."""
