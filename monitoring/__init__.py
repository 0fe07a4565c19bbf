"""The monitor: it takes predictions and refusals from the prediction log into a database, and answers with figures."""
