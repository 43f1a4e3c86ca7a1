"""What becomes of the predictions of a trained model: the library of predict."""
