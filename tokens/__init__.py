"""Pictures as codes: quantised autoencoders, and transformers that write one code after the other."""
