"""What sweeps and trained models tell: tables and figures, read from workdirs."""
