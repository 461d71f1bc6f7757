/* Touches memory in a guest and, when told, rewrites it: memory_load FILL_MIB READY_FILE
 *
 * Every page gets contents of its own, so that no copy of it can be shortened. READY_FILE is made when all is touched.
 * SIGUSR1 begins to write one word of each page, round and round, as fast as the processor can; SIGUSR2 ends it.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE_WORDS = 512 };

static volatile sig_atomic_t rewriting;

static void begin(int number) { (void)number; rewriting = 1; }
static void end(int number) { (void)number; rewriting = 0; }

int main(int count, char **arguments)
{
    if (count != 3)
        return 2;
    size_t words = (size_t)atol(arguments[1]) << 17;
    uint64_t *memory = mmap(NULL, words * sizeof *memory, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return 1;
    signal(SIGUSR1, begin);
    signal(SIGUSR2, end);
    uint64_t state = 88172645463325252u; /* xorshift64, Marsaglia 2003 */
    for (size_t word = 0; word < words; word++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        memory[word] = state;
    }
    if (close(open(arguments[2], O_CREAT | O_WRONLY, 0600)) != 0)
        return 1;
    for (uint64_t round = 1;; round++) {
        while (!rewriting)
            sleep(1); /* a signal ends it early */
        for (size_t word = 0; word < words; word += PAGE_WORDS)
            memory[word] = round;
    }
}
