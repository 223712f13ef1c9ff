"""python -m lora_lite; see cli/main.py."""

from .cli.main import main

if __name__ == "__main__":
    main()
