/* Asks a guest every millisecond and prints the silences: outside IPV4_ADDRESS
 *
 * It sends ICMP echo requests (RFC 792), because the guest's kernel answers those whatever its programs do, until its
 * standard input ends. A silence begins with the first request after an answer and ends with the next answer, by the
 * kernel's time of its arrival: what this program is late by is not the guest's. Each line is one silence of more than two
 * milliseconds: its beginning, in seconds since the epoch, and its length in seconds.
 *
 * In C, so that it takes next to nothing of the processors that guest and capture share.
 */
#include <arpa/inet.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PERIOD_NS = 1000000, NS = 1000000000 };
static const double SILENCE_S = 0.002;

static double asked_s; /* 0: every request was answered */

static double seconds(struct timespec at) { return (double)at.tv_sec + (double)at.tv_nsec / NS; }

static void print_silence(double until_s)
{
    if (until_s - asked_s > SILENCE_S)
        printf("%.6f %.6f\n", asked_s, until_s - asked_s);
}

static uint16_t checksum(const struct icmphdr *request)
{
    uint16_t words[sizeof *request / 2];
    memcpy(words, request, sizeof words);
    uint32_t total = 0;
    for (size_t at = 0; at < sizeof words / 2; at++)
        total += words[at];
    total = (total & 0xFFFF) + (total >> 16);
    return (uint16_t)~(total + (total >> 16));
}

static void ask(int channel, uint16_t number)
{
    struct icmphdr request = {.type = ICMP_ECHO, .un.echo = {.id = htons((uint16_t)getpid()), .sequence = htons(number)}};
    struct timespec now;
    request.checksum = checksum(&request);
    clock_gettime(CLOCK_REALTIME, &now);
    if (send(channel, &request, sizeof request, MSG_DONTWAIT) == sizeof request && asked_s == 0)
        asked_s = seconds(now);
}

static void take_answers(int channel)
{
    char packet[256], notes[128];
    struct iovec room = {packet, sizeof packet};
    for (;;) {
        struct msghdr message = {.msg_iov = &room, .msg_iovlen = 1, .msg_control = notes, .msg_controllen = sizeof notes};
        ssize_t size = recvmsg(channel, &message, MSG_DONTWAIT);
        if (size <= 0)
            return;
        size_t header = (size_t)(packet[0] & 15) * 4;
        struct icmphdr answer;
        if ((size_t)size < header + sizeof answer)
            continue;
        memcpy(&answer, packet + header, sizeof answer);
        if (answer.type != ICMP_ECHOREPLY || answer.un.echo.id != htons((uint16_t)getpid()))
            continue;
        for (struct cmsghdr *note = CMSG_FIRSTHDR(&message); note != NULL; note = CMSG_NXTHDR(&message, note)) {
            struct timespec arrived;
            if (note->cmsg_level != SOL_SOCKET || note->cmsg_type != SO_TIMESTAMPNS)
                continue;
            memcpy(&arrived, CMSG_DATA(note), sizeof arrived);
            if (asked_s != 0 && seconds(arrived) >= asked_s) {
                print_silence(seconds(arrived));
                asked_s = 0;
            }
        }
    }
}

int main(int count, char **arguments)
{
    struct sockaddr_in guest = {.sin_family = AF_INET};
    if (count != 2 || inet_pton(AF_INET, arguments[1], &guest.sin_addr) != 1)
        return 2;
    int channel = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP), yes = 1, room = 1 << 20;
    if (channel < 0 || connect(channel, (struct sockaddr *)&guest, sizeof guest) != 0)
        return 1;
    if (setsockopt(channel, SOL_SOCKET, SO_TIMESTAMPNS, &yes, sizeof yes) != 0)
        return 1;
    setsockopt(channel, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
    setpriority(PRIO_PROCESS, 0, -10);

    struct timespec next, now;
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    clock_gettime(CLOCK_MONOTONIC, &next);
    for (uint16_t number = 0; poll(&input, 1, 0) == 0; number++) {
        take_answers(channel);
        ask(channel, number);
        next.tv_nsec += PERIOD_NS;
        if (next.tv_nsec >= NS) {
            next.tv_nsec -= NS;
            next.tv_sec++;
        }
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (seconds(next) < seconds(now))
            next = now; /* late: the requests that were missed are not made up for */
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
    }
    take_answers(channel);
    if (asked_s != 0) {
        clock_gettime(CLOCK_REALTIME, &now);
        print_silence(seconds(now));
    }
    return 0;
}
