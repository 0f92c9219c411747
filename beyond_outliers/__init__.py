"""beyond_outliers: how does the choice of optimizer change what quantization costs a language
model?"""

__version__ = "0.1.0"
