//! What a PC is: buses, interrupt controllers, timers, canonical state, and the traits that engines and devices implement.
#![forbid(unsafe_code)]
