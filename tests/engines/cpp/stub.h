// What a test may ask of the stub, and plant in it.
#ifndef REPVGG_STUB_H
#define REPVGG_STUB_H

namespace stub {

// Lets the call of this number fail, counted from 1 on from now; 0 for none. With `forever`, all later ones, too.
void fail_call(long number, bool forever = false);
bool has_failed();  // whether the planted failure came to pass
long calls();       // that could have failed, since fail_call
long live();        // blocks of memory and objects that are not freed
long violations();  // things done that a real GPU would punish; each is a line on stderr
long compiled();    // kernels that were compiled, since fail_call

// Above 0 while this thread is inside of the stub, whose own allocations are not those of the program under test.
extern thread_local int inside;

}  // namespace stub

#endif  // REPVGG_STUB_H
