"""One file per verb of the command line. Heavy imports wait until a verb runs, so that --help is instant."""
