"""What may go wrong in the night: every place of a run crossed with everything that can happen there."""
