"""`python -m dataset_tools`."""

from dataset_tools.starting import start_program

if __name__ == "__main__":
    start_program()
    from dataset_tools.cli import main

    main()
