"""python -m cxr_vit COMMAND: see cxr_vit.cli."""

from cxr_vit.cli import main, run

if __name__ == "__main__":
    run(main)
