"""The model: Hugging Face's ViT, split into stages."""
