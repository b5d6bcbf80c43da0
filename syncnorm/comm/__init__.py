"""Process groups and the exchange of messages. Knows no layers."""

# First: groups, flight and signing lean on it and on each other.
from syncnorm.comm import exchange as exchange
