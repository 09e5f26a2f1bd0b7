//! Tiny guests on the host's KVM. Each prints `skipped: …` where there is none.
//!
//! They are real-mode programs of a few bytes, so that they run even on a KVM that cannot run a kernel.

use std::sync::{Arc, Mutex, OnceLock, Weak, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm::{Vcpu, Vm};
use machine::bus::Doorbells;
use machine::cpu::{Activity, Debug, Exit, State, Stop, Vcpu as _};
use machine::irq::{Controllers, LocalApics, Msi};
use machine::{Clock, EventFd, Machine, Memory, Registers};
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use x86::cpuid::{Config, Cpuid, Feature, Model, Vendor};
use x86::{Segment, gpr, segment::index};

/// Where the programs lie.
const CODE: u64 = 0x1000;
/// The port that ends a program: its write kicks the vCPU.
const END: u8 = 0xf4;

/// A device that records writes and answers reads with consecutive numbers.
#[derive(Default)]
struct Recorder {
    writes: Mutex<Vec<(u64, u8, u64)>>,
    reads: Mutex<u64>,
    kick: Mutex<Option<Arc<dyn machine::cpu::Kick>>>,
}

impl Registers for Recorder {
    fn read(&self, _: u64, _: u8) -> u64 {
        let mut reads = self.reads.lock().unwrap();
        *reads += 1;
        *reads
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        self.writes.lock().unwrap().push((offset, size, value));
        if let Some(kick) = &*self.kick.lock().unwrap() {
            kick.kick();
        }
    }
}

struct Guest {
    machine: Arc<Machine>,
    vm: Vm,
    vcpu: Vcpu,
    ports: Arc<Recorder>,
    mmio: Arc<Recorder>,
}

impl Guest {
    /// Runs until it stops, or kicks it after ten seconds.
    fn run(&mut self) -> Exit {
        let kicker = self.vcpu.kicker();
        let (done, waited) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                if waited.recv_timeout(Duration::from_secs(10)) == Err(mpsc::RecvTimeoutError::Timeout) {
                    println!("the guest hangs");
                    kicker.kick();
                }
            });
            let exit = self.vcpu.run().unwrap();
            drop(done);
            exit
        })
    }
}

/// A guest about to execute `code` in real mode, with its segments at 0 and its stack at 0x8000.
fn guest(code: &[u8]) -> Option<Guest> {
    if let Err(e) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        println!("skipped: /dev/kvm: {e}");
        return None;
    }
    let memory = Memory::new(2 << 20, 0x1000).unwrap();
    let machine = Arc::new(Machine::new(memory, Clock::host(1_000_000)).unwrap());
    let (ports, mmio, end) =
        (Arc::<Recorder>::default(), Arc::<Recorder>::default(), Arc::<Recorder>::default());
    machine.ports.insert(0x40, 8, "ports", ports.clone()).unwrap();
    machine.ports.insert(END.into(), 1, "end", end.clone()).unwrap();
    machine.mmio.insert(0xa_0000, 0x1000, "mmio", mmio.clone()).unwrap();
    let vm = Vm::new(&machine.memory).unwrap();
    let config = Config {
        model: Model::Host,
        vendor: Vendor::Amd,
        available: vm.features(),
        vcpus: 1,
        tsc_khz: machine.clock.tsc_khz(),
        host: None,
    };
    let model = Cpuid::new(&config).unwrap();
    let mut vcpu = vm.vcpu(0, &model, machine.clone()).unwrap();
    *end.kick.lock().unwrap() = Some(vcpu.kicker());
    machine.memory.write(CODE, code);
    let state = real_mode(&vcpu.state().unwrap());
    vcpu.set_state(&state).unwrap();
    Some(Guest { machine, vm, vcpu, ports, mmio })
}

/// The same, for what only a KVM that can run a kernel does right.
fn guest_of_usable_kvm(code: &[u8]) -> Option<Guest> {
    static USABLE: OnceLock<Result<kvm::Usable, kvm::Unusable>> = OnceLock::new();
    match USABLE.get_or_init(kvm::probe) {
        Ok(_) => guest(code),
        Err(unusable) => {
            println!("skipped: {}", unusable.reason);
            None
        }
    }
}

fn real_mode(reset: &State) -> State {
    let mut state = reset.clone();
    state.segments = [Segment::real(0); 6];
    state.segments[index::CS].attributes |= x86::segment::attr::CODE;
    state.rip = CODE;
    state.gpr[gpr::RSP] = 0x8000;
    state
}

/// Lets DS reach all of the 4 GiB.
fn big_real_mode(vcpu: &mut Vcpu) {
    let mut state = vcpu.state().unwrap();
    state.segments[index::DS].limit = u32::MAX;
    state.segments[index::DS].attributes |= x86::segment::attr::G;
    vcpu.set_state(&state).unwrap();
}

#[test]
fn ports_and_memory_mapped_registers() {
    let Some(mut g) = guest(&[
        0xe5, 0x40, // in ax, 0x40
        0xe6, 0x42, // out 0x42, al
        0xba, 0x44, 0x00, // mov dx, 0x44
        0xbf, 0x00, 0x20, // mov di, 0x2000
        0xb9, 0x03, 0x00, // mov cx, 3
        0xfc, 0xf3, 0x6d, // cld; rep insw
        0xbe, 0x00, 0x20, // mov si, 0x2000
        0xb9, 0x03, 0x00, // mov cx, 3
        0xf3, 0x6e, // rep outsb
        0xb8, 0x00, 0xa0, 0x8e, 0xd8, // mov ax, 0xa000; mov ds, ax
        0x66, 0xa1, 0x10, 0x00, // mov eax, [0x10]
        0x66, 0xa3, 0x20, 0x00, // mov [0x20], eax
        0xe6, END, // out END, al
    ]) else {
        return;
    };
    assert_eq!(g.run(), Exit::Kicked);
    assert_eq!(*g.ports.writes.lock().unwrap(), [(2, 1, 1), (4, 1, 2), (4, 1, 0), (4, 1, 3)]);
    assert_eq!(*g.mmio.writes.lock().unwrap(), [(0x20, 4, 1)]);
    assert_eq!(g.machine.memory.load::<u16>(0x2004), 4);
    let stats = g.vcpu.stats();
    assert!(stats.counters.iter().any(|&(name, n)| name == "MMIO reads" && n == 1), "{stats:?}");
}

#[test]
fn rom_ignores_writes() {
    let Some(mut g) = guest(&[
        0x66, 0xbb, 0x00, 0xf0, 0xff, 0xff, // mov ebx, 0xfffff000
        0x67, 0xc6, 0x03, 0x55, // mov byte [ebx], 0x55
        0x67, 0x8a, 0x03, // mov al, [ebx]
        0xe6, 0x40, // out 0x40, al
        0xe6, END,
    ]) else {
        return;
    };
    big_real_mode(&mut g.vcpu);
    assert_eq!(g.run(), Exit::Kicked);
    assert_eq!(*g.ports.writes.lock().unwrap(), [(0, 1, 0)]);
}

#[test]
fn a_kick_ends_a_loop_and_is_not_lost_while_not_running() {
    let Some(mut g) = guest(&[0xeb, 0xfe]) else { return };
    g.vcpu.kicker().kick();
    assert_eq!(g.run(), Exit::Kicked);
    let kicker = g.vcpu.kicker();
    let (started, wait) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        wait.recv().unwrap();
        kicker.kick();
    });
    started.send(()).unwrap();
    assert_eq!(g.run(), Exit::Kicked);
    thread.join().unwrap();
}

#[test]
fn a_triple_fault_is_reported_and_stays() {
    // lidt [cs:0x1010], with a limit of 0; int3
    let mut code = vec![0x0f, 0x01, 0x1e, 0x10, 0x10, 0xcc];
    code.resize(0x16, 0);
    let Some(mut g) = guest_of_usable_kvm(&code) else { return };
    assert_eq!(g.run(), Exit::TripleFault);
    assert_eq!(g.vcpu.state().unwrap().activity, Activity::Shutdown);
    assert_eq!(g.run(), Exit::TripleFault);
}

#[test]
fn vector_state_goes_out_and_in() {
    let Some(mut g) = guest(&[0xeb, 0xfe]) else { return };
    let has = |feature| g.vm.features().has(feature);
    let (xcr0, width) = match (has(Feature::XSAVE), has(Feature::AVX)) {
        (true, true) => (7, 32),
        (true, false) => (3, 16),
        (false, _) => (1, 16),
    };
    let mut state = g.vcpu.state().unwrap();
    state.xcr0 = xcr0;
    for (n, ymm) in state.fpu.ymm.iter_mut().enumerate() {
        (0..width).for_each(|i| ymm[i] = (32 * n + i) as u8);
    }
    state.fpu.st[7] = [9; 10];
    state.fpu.ftw = 0x80;
    state.fpu.mxcsr = 0x1fa0;
    g.vcpu.set_state(&state).unwrap();
    let back = g.vcpu.state().unwrap();
    assert_eq!((back.xcr0, back.fpu), (xcr0, state.fpu));
}

#[test]
fn state_goes_out_and_in() {
    let Some(mut g) = guest_of_usable_kvm(&[0xeb, 0xfe]) else { return };
    let mut state = g.vcpu.state().unwrap();
    state.gpr = std::array::from_fn(|i| 0x0123_4567_89ab_cdef ^ (i as u64) << 32);
    state.fpu.fcw = 0x27f;
    state.fpu.st[2] = [1, 2, 3, 4, 5, 6, 7, 0x80, 0xff, 0x3f];
    state.fpu.ymm[5] = std::array::from_fn(|i| if i < 16 { i as u8 } else { 0 });
    state.fpu.mxcsr = 0x1fa0;
    state.dr = [0x1000, 0x2000, 0x3000, 0x4000];
    state.msrs.star = 0x23_0010_0000_0000;
    state.msrs.lstar = 0xffff_ffff_8100_0000;
    state.msrs.sfmask = 0x4_7700;
    state.msrs.tsc_offset = 10_000_000_000;
    g.vcpu.set_state(&state).unwrap();
    let mut back = g.vcpu.state().unwrap();
    let drift = back.msrs.tsc_offset.abs_diff(state.msrs.tsc_offset);
    assert!(drift < 10_000_000, "the TSC is {drift} ticks of 1 GHz off");
    back.msrs.tsc_offset = state.msrs.tsc_offset;
    assert_eq!(back, state);
}

/// A program that turns its LAPIC on, tells by a write to port 0x40 that it has, and halts. Vector 0x41 has `handler`.
fn waits_for_interrupts(handler: &[u8]) -> Option<Guest> {
    let mut code = vec![
        0x66, 0xbb, 0xf0, 0x00, 0xe0, 0xfe, // mov ebx, 0xfee000f0, the spurious-interrupt register
        0x67, 0x66, 0xc7, 0x03, 0xff, 0x01, 0x00, 0x00, // mov dword [ebx], 0x1ff: the LAPIC is on
        0xe6, 0x40, // out 0x40, al
        0xfb, 0xf4, 0xeb, 0xfd, // sti; hlt; jmp to the hlt
    ];
    code.resize(0x40, 0x90);
    code.extend(handler);
    let mut g = guest_of_usable_kvm(&code)?;
    big_real_mode(&mut g.vcpu);
    g.machine.memory.store(0x41 * 4, CODE as u32 + 0x40);
    Some(g)
}

/// Calls `then` when the guest's LAPIC is on.
fn when_on<R: Send + 'static>(g: &Guest, then: impl FnOnce() -> R + Send + 'static) -> JoinHandle<R> {
    let ports = g.ports.clone();
    std::thread::spawn(move || {
        while ports.writes.lock().unwrap().is_empty() {
            std::thread::yield_now();
        }
        then()
    })
}

const MESSAGE: Msi = Msi { address: 0xfee0_0000, data: 0x41 };

#[test]
fn a_message_wakes_a_halted_processor() {
    // in al, 0x40; out END, al
    let Some(mut g) = waits_for_interrupts(&[0xe4, 0x40, 0xe6, END]) else { return };
    assert!(!g.vm.send(MESSAGE), "a LAPIC that is off takes nothing");
    let vm = g.vm.clone();
    let thread = when_on(&g, move || vm.send(MESSAGE));
    assert_eq!((g.run(), *g.ports.reads.lock().unwrap()), (Exit::Kicked, 1));
    assert!(thread.join().unwrap(), "the LAPIC took it");
}

#[test]
fn events_stand_for_messages_and_for_writes() {
    // mov ebx, 0xd0000000; mov [ebx], al; out END, al
    let handler = [0x66, 0xbb, 0x00, 0x00, 0x00, 0xd0, 0x67, 0x88, 0x03, 0xe6, END];
    let Some(mut g) = waits_for_interrupts(&handler) else { return };
    let doorbell = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let moved = g.vm.watch(0xc000_0000, &doorbell).unwrap();
    drop(moved);
    let _watch = g.vm.watch(0xd000_0000, &doorbell).unwrap();
    // One that goes gives its place to the next, and messages change.
    let (gone, stays) = (g.vm.route().unwrap(), g.vm.route().unwrap());
    drop(gone);
    let interrupt = g.vm.route().unwrap();
    stays.send(Msi { address: 0xfee0_2000, data: 0x98 });
    interrupt.send(Msi { address: 0xfee0_2000, data: 0x99 });
    let thread = when_on(&g, move || interrupt.send(MESSAGE));
    assert_eq!(g.run(), Exit::Kicked);
    thread.join().unwrap();
    assert_eq!(doorbell.read().unwrap(), 1);
    assert!(g.vcpu.stats().counters.contains(&("MMIO writes", 0)), "no exit");
}

#[test]
fn the_end_of_a_level_triggered_interrupt_is_told() {
    // mov dword [ebx - 0x40], 0: EOI; out END, al
    let handler = [0x67, 0x66, 0xc7, 0x43, 0xc0, 0, 0, 0, 0, 0xe6, END];
    for (level, told) in [(true, vec![0x41]), (false, vec![])] {
        let Some(mut g) = waits_for_interrupts(&handler) else { return };
        let pic = Arc::new(Pic::new(&g));
        let weak: Weak<Pic> = Arc::downgrade(&pic);
        g.vm.connect(weak);
        let mut routes = [None; 24];
        routes[9] = Some((MESSAGE, level));
        g.vm.routes(&routes);
        let vm = g.vm.clone();
        let data = MESSAGE.data | if level { 1 << 15 | 1 << 14 } else { 0 };
        when_on(&g, move || vm.send(Msi { data, ..MESSAGE }));
        assert_eq!(g.run(), Exit::Kicked);
        assert_eq!(*pic.ended.lock().unwrap(), told);
    }
}

#[test]
fn the_pics_interrupt_waits_for_the_window() {
    // Interrupts off; out 0x40, al; sti; nop; jmp $; handler at 0x10: out END, al
    let mut code = vec![0xe6, 0x40, 0xfb, 0x90, 0xeb, 0xfe];
    code.resize(0x10, 0x90);
    code.extend([0xe6, END]);
    let Some(mut g) = guest(&code) else { return };
    g.machine.memory.store(0x08 * 4, 0x1010u32);
    let pic = Arc::new(Pic::new(&g));
    let weak: Weak<Pic> = Arc::downgrade(&pic);
    g.vm.connect(weak);
    g.vm.intr(true);
    assert_eq!(g.run(), Exit::Kicked);
    assert_eq!(*pic.seen.lock().unwrap(), [1], "acknowledged once, after the write that came before STI");
}

/// One interrupt, vector 8; remembers how many writes came before its acknowledgement, and what EOIs there were.
struct Pic {
    vm: Vm,
    ports: Arc<Recorder>,
    seen: Mutex<Vec<usize>>,
    ended: Mutex<Vec<u8>>,
}

impl Pic {
    fn new(g: &Guest) -> Self {
        Self { vm: g.vm.clone(), ports: g.ports.clone(), seen: Mutex::default(), ended: Mutex::default() }
    }
}

impl Controllers for Pic {
    fn acknowledge(&self) -> Option<u8> {
        self.vm.intr(false);
        self.seen.lock().unwrap().push(self.ports.writes.lock().unwrap().len());
        Some(8)
    }

    fn eoi(&self, vector: u8) {
        self.ended.lock().unwrap().push(vector);
    }
}

#[test]
fn single_steps() {
    let Some(mut g) = guest_of_usable_kvm(&[0x90, 0x40, 0xe6, 0x40, 0x40, 0xe6, END]) else { return };
    g.vcpu.debug(&Debug { step: true, ..Debug::default() }).unwrap();
    for after in [1, 2, 4, 5] {
        assert_eq!(g.run(), Exit::Debug(Stop::Step));
        assert_eq!(g.vcpu.state().unwrap().rip, CODE + after);
    }
    assert_eq!(*g.ports.writes.lock().unwrap(), [(0, 1, 1)]);
    assert_eq!(g.vcpu.state().unwrap().rflags & x86::flags::TF, 0, "the guest does not see it");
    g.vcpu.debug(&Debug::default()).unwrap();
    assert_eq!(g.run(), Exit::Kicked);
    assert_eq!(g.vcpu.translate(0x1234), Some(0x1234), "no paging");
}

#[test]
fn breakpoints_and_watchpoints() {
    // inc ax three times; mov [0x2000], al; out END, al
    let Some(mut g) = guest_of_usable_kvm(&[0x40, 0x40, 0x40, 0xa2, 0x00, 0x20, 0xe6, END]) else { return };
    // "TCGTCGTCGTCG"
    if core::arch::x86_64::__cpuid(0x4000_0000).ebx == u32::from_le_bytes(*b"TCGT") {
        println!("skipped: QEMU's emulated processor does not look at a guest's debug registers");
        return;
    }
    let watch = (0x2000, 1, false);
    let stops = Debug { breakpoints: vec![CODE + 2], watchpoints: vec![watch], ..Debug::default() };
    g.vcpu.debug(&stops).unwrap();
    assert_eq!(g.run(), Exit::Debug(Stop::Breakpoint(CODE + 2)));
    let state = g.vcpu.state().unwrap();
    assert_eq!((state.rip, state.gpr[gpr::RAX]), (CODE + 2, 2), "not executed yet");
    assert_eq!(g.run(), Exit::Debug(Stop::Watchpoint(0x2000)), "and not stopped at twice");
    assert_eq!(g.run(), Exit::Kicked);
    assert_eq!(g.machine.memory.load::<u8>(0x2000), 3);
}
