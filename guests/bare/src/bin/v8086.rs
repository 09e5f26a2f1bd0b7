//! Virtual-8086 mode (SDM 3B, chapter 21) and 16-bit tasks (SDM 3A, 8.6).
#![no_std]
#![no_main]

#[path = "v8086/exceptions.rs"]
mod exceptions;
#[path = "v8086/instructions.rs"]
mod instructions;
#[path = "v8086/machine.rs"]
mod machine;
#[path = "v8086/switches.rs"]
mod switches;
#[path = "v8086/tasks16.rs"]
mod tasks16;

use bare::{cpu, legacy, report::Report, trap};

bare::guest!(main);

fn main() {
    let mut t = Report::new("v8086");
    if !cpu::has(1, 3, 1) {
        // SAFETY: raises an exception, or sets a bit that only matters to virtual-8086 mode.
        let trap = trap::catch(|| unsafe { cpu::set_cr4(cpu::cr4() | 1) });
        t.tcg("CR4.VME can be set without VME").trap("CR4.VME without VME", trap, 13, 0);
    }
    legacy::init();
    instructions::run(&mut t);
    exceptions::run(&mut t);
    switches::run(&mut t);
    tasks16::run(&mut t);
    t.end()
}
