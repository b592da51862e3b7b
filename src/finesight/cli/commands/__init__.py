"""The arguments of each command, one command a file; what a command does is in the modules beside this package.

Nothing that it needs is imported before it runs.
"""
