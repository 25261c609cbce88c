"""Drop-ins for other libraries' losses. None of those libraries is imported."""
