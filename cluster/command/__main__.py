"""`python -m cluster.command`: `expertmesh` where the package is on the path and not installed, as in a job."""

from cluster.command.main import main

if __name__ == "__main__":
    main()
