"""The studio: one page to configure, train, watch and talk. It imports no torch; runs, chat and export are child processes."""
