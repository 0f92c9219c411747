"""Linear algebra of the optimizers: products, roots, orthogonal factors of stacks of matrices."""
