"""`python -m syncnorm` is the command `syncnorm`."""

from syncnorm.cli import main

if __name__ == "__main__":
    main()
