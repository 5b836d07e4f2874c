"""What an operator may do: compression jobs, and which models are served."""
