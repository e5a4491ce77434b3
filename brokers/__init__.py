"""Everything between the HTTP routes and the brokers: workers, limits, journal, adapters."""
