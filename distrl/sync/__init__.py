"""Moving weights from the learner to the generators: one file per transport."""
