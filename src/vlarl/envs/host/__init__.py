"""The child's side of env hosts: Python 3.8 grammar, standard library, numpy and one simulator; never torch."""
