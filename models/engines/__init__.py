"""What predicts, one room for each library; nothing here is imported before it is used."""
