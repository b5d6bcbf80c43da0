"""Process groups and the exchange of messages. Knows no layers."""
