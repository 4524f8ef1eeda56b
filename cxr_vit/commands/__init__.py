"""The commands of `cxr-vit`: each composes the packages it needs when it runs."""
