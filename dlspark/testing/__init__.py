"""What a plug-in's author needs to prove a backend: the contract as tests, and the toys that it trains."""
