"""What the transformer is measured against: the classical network behind the same contract."""
