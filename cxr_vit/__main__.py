"""python -m cxr_vit COMMAND: see cxr_vit.cli."""

from cxr_vit.cli import console

if __name__ == "__main__":
    console()
