"""What each verb of the command line does, as functions that Python could call too.

Their signatures are the options, their docstrings the help. Heavy libraries are imported inside, so
that ``--help`` answers at once.
"""
