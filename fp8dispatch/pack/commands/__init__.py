"""The subcommands of ``fp8dispatch`` that work on checkpoints: one module each."""
