"""The questions to the machine: against machines, drivers and packages that are made up."""
