"""What every chapter uses and none of them teaches."""
