"""What happens after the answer: the monitor takes predictions and refusals from the prediction log into a database."""
