"""fusedmoe inside other libraries: a module for each, which imports that library; nothing here imports them all."""
