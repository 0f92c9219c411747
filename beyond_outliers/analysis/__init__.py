"""Tables and figures of sweeps and trained models, read from workdirs."""
