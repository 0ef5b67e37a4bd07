"""What the three loss heads share: the rows of a vocabulary, their targets, their gradients."""
