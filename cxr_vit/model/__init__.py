"""The model: Hugging Face's ViT cut into stages. Importing this package imports no torch."""
