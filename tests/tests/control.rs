//! A VM that runs is reached by its name.

use std::process::Command;
use std::time::Duration;

use lodge_tests::{Scratch, lodge, start_typing, start_with};

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_running_vm_is_listed_looked_at_typed_into_and_stopped() {
    if lodge_tests::cached_guest().is_none() {
        return;
    }
    let scratch = Scratch::new("control");
    let command = |args: &[&str]| {
        let mut command = Command::new(lodge());
        command.args(args).env("LODGE_RUNTIME_DIR", scratch.path());
        command
    };
    let ask = |args: &[&str], input: &str| start_with(&mut command(args), input).wait(PATIENCE);
    assert!(ask(&["ls"], "").expect(0).out.starts_with("No virtual machine"));

    let (vm, keyboard) = start_typing(&mut command(&["run", "--engine", "translate", "--name", "one"]));
    vm.line("built-in commands", PATIENCE);
    let listed = ask(&["ls", "--json"], "").expect(0).out;
    assert!(listed.contains("\"one\"") && listed.contains(&vm.child.id().to_string()), "{listed}");
    let again = ask(&["run", "--name", "one"], "").expect(2).err;
    assert!(again.contains("called one is running"), "{again}");

    // What was on the console before is shown, and what is typed is answered there.
    let (console, mut typing) = start_typing(&mut command(&["console", "one"]));
    console.line("built-in commands", PATIENCE);
    std::io::Write::write_all(&mut typing, b"echo typed $((6*7))\n").unwrap();
    console.line("typed 42", PATIENCE);
    drop(typing);
    console.wait(PATIENCE).expect(0);

    let patience = ask(&["stop", "one", "--timeout", "0.1"], "").expect(2).err;
    assert!(patience.contains("still runs"), "{patience}");
    ask(&["stop", "one", "--force"], "").expect(0);
    let ended = vm.wait(PATIENCE).expect(130);
    assert!(ended.err.contains("ended by `lodge stop`"), "{}", ended.err);
    drop(keyboard);
    let gone = ask(&["stop", "one"], "").expect(2).err;
    assert!(gone.contains("no virtual machine called one"), "{gone}");
}
