"""``python -m slimvlm``."""

from slimvlm.cli import main

if __name__ == "__main__":
    main()
