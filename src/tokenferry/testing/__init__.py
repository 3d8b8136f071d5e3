"""What tests, benchmarks and the demo share: an oracle of plain loops, cases, and ranks to run them on."""
