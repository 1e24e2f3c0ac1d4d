"""LIBERO (Liu et al. 2023): five suites of tabletop and kitchen tasks in robosuite, played in env hosts."""
