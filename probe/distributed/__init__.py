"""Where the processes of a distributed run meet."""
