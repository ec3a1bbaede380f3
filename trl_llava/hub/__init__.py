"""From the Hub and to the Hub."""
