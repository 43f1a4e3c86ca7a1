"""Plain references and tiny data sets that several tests share."""
